"""`diorama <group> <verb>`; heavy imports happen inside the functions."""
