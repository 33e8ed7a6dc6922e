"""This host through /proc, /sys and its cgroup: `host.HostCollector` is the door, the rest are its parts."""
