"""Helper modules in this folder can be imported by the tests of its rooms."""
