"""The compiled CPU kernels: C sources, and how they are built, checked and called."""
