"""Every figure of the pages, one script each: `python -m benchmarks.NAME`; all of them: `python -m benchmarks`."""
