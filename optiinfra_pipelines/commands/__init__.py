"""What each `optiinfra` command does; `optiinfra_pipelines.cli` only parses the line. Nothing imports these."""
