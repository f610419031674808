"""Training setups of the diorama family, and the parts that have no recipe."""
