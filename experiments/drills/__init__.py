"""Drills: real runs that are really killed, really cut off from their database."""
