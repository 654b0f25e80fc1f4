"""What ships: exporting a bundle, and inspecting one."""
