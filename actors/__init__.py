"""The mechanism: actors and the kernel they run on. Imports the standard library and trio, nothing else."""
