"""What the `bench` command measures: time and memory of a bundle on this machine."""
