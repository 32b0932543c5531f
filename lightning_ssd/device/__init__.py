"""Memory of a device that is not the host's: streams, copies, and who waits for them."""
