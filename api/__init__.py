"""What speaks: HTTP and the command line. Never loads torch."""
