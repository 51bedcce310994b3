"""What the API takes and gives: every field has a range and a sentence, and the OpenAPI document is made from them."""
