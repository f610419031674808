"""`skyloom <verb>`: one file per group of verbs; heavy imports happen inside the functions."""
