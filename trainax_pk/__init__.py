"""JAX-native functional training for neural emulators."""
