"""Workers: processes that lease jobs and render them."""
