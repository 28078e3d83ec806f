"""What to put at which seam: adapters and rows. Kernels are imported when a patch is bound, not before."""
