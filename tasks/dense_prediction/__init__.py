"""The modality `dense_prediction`: models that say something of every pixel, or give a picture, with a head each."""
