"""Ways to choose codes, beyond the nearest."""
