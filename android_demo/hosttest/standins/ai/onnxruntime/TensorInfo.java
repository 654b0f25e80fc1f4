package ai.onnxruntime;

import java.util.Arrays;

public class TensorInfo implements ValueInfo {
    final long[] shape;

    TensorInfo(long[] shape) {
        this.shape = shape;
    }

    public long[] getShape() {
        return Arrays.copyOf(shape, shape.length);
    }
}
