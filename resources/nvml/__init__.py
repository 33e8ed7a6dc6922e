"""This host's GPUs through NVIDIA's driver: `gpus.GpuCollector` is the door, the rest are its parts."""
