"""What is wrong: bottlenecks and findings of replicas, GPUs, hosts and deployments, from frames."""
