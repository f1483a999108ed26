"""Ways to a device, one file each; each passes the transport contract suite."""
