"""What is profitable: one file per method, each names its paper."""
