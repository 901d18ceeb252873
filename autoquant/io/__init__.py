"""Files and folders that are there whole or not at all, and tensors one by one."""
