"""What people see: text and tables made from a config alone."""
