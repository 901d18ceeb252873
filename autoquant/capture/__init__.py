"""From a module to ATen graphs."""
