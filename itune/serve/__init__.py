"""The HTTP service: `app.py` answers requests, `queue.py` makes batches, `pool.py` keeps workers running."""
