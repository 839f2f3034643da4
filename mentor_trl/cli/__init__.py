"""The command line `mentor-trl`."""
