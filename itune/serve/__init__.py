"""The HTTP service: `app.py` answers requests, `queue.py` makes batches of them, `workers.py` runs the captioners."""
