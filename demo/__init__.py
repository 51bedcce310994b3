"""The ten-minute demo: emoji drawn by several vendors, from fetching them to searching them in a browser."""
