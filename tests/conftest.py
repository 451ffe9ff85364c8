"""Helper modules in this folder can be imported by all tests."""
