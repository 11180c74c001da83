"""Declarations of routes, their requests and their responses, independent of any server or framework."""
