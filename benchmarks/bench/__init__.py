"""What the benchmarks are made of: contenders, the processes they run in, roofs, goals, tables, a picture."""
