"""What `benchmarks.gpu_day` runs, a module for each part, each in a process of its own."""
