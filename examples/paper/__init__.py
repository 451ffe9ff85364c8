"""What the five tasks of Hu et al. (2024, arXiv 2310.04363) share.

A task is a script beside this package: a program, its methods, and what is measured of a method with a
seed. Here is the rest: the command line (``command``), training at equal language-model tokens
(``training``), a proposal on held-out inputs (``evaluation``), rows of results (``rows``), inputs and
what is wrong with them (``inputs``).
"""
