"""OptiInfra pipelines: what it decides. The map of the tree is in README.md."""
