"""How weights become quantized: a source of plain parameters in, one of quantized ones out, part by part."""
