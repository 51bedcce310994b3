"""Retrieval among pictures with classes: SOP, Cars196, CUB, iNaturalist, In-shop, VehicleID."""
