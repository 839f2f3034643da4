"""The scripts that the command line launches."""
