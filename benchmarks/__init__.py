"""What lmppl costs: a suite of benchmarks, each against what one would use instead.

    make bench          # a few minutes: python -m benchmarks --quick
    make bench-full     # everything, longer

See docs/performance.md for what is measured, and how to read it. ``compare_engines.py``,
``engine_table.py`` and ``infilling.py`` are experiments about the quality of inference, run on their
own.
"""
