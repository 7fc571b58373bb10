"""Helpers without any knowledge of networks: files, progress, digests, interrupts, the checks of arguments."""
