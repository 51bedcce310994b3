"""Google Landmarks v2: retrieval (mAP@100) and recognition (GAP), with the official csv files in and out."""
