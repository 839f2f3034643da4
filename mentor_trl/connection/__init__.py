"""Requests to servers, whatever they serve: addresses, patience, retries, and answers read with suspicion."""
