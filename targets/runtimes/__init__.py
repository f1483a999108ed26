"""What executes a model on a device, one file each; each passes the runtime contract suite."""
