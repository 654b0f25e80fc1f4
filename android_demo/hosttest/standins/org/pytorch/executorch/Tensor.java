package org.pytorch.executorch;

import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.ShortBuffer;

public abstract class Tensor {
    final long[] shape;

    private Tensor(long[] shape) {
        this.shape = shape.clone();
    }

    public static Tensor fromBlob(FloatBuffer data, long[] shape) {
        check(data, data.order(), shape);
        return new TensorFloat32(data, shape);
    }

    public static Tensor fromBlob(LongBuffer data, long[] shape) {
        check(data, data.order(), shape);
        return new TensorInt64(data, shape);
    }

    public static Tensor fromBlob(ShortBuffer data, long[] shape) {
        check(data, data.order(), shape);
        return new TensorFloat16(data, shape);
    }

    /** As in the real class, the capacity counts, not what remains. */
    private static void check(Buffer data, ByteOrder order, long[] shape) {
        for (long dimension : shape) checkArgument(dimension >= 0, "Shape elements must be non negative");
        checkArgument(numel(shape) == data.capacity(), "Inconsistent data capacity:" + data.capacity()
                + " and shape number elements:" + numel(shape) + " shape:" + java.util.Arrays.toString(shape));
        checkArgument(data.isDirect(), "Data buffer must be direct (java.nio.ByteBuffer#allocateDirect)");
        checkArgument(order == ByteOrder.nativeOrder(),
                "Data buffer must have native byte order (java.nio.ByteOrder#nativeOrder)");
    }

    private static void checkArgument(boolean holds, String message) {
        if (!holds) throw new IllegalArgumentException(message);
    }

    /** An output, in the method's own memory. */
    static Tensor nativeNewTensor(ByteBuffer data, long[] shape, int dtype) {
        data.order(ByteOrder.nativeOrder());
        return dtype == DType.FLOAT.jniCode
                ? new TensorFloat32(data.asFloatBuffer(), shape)
                : new TensorInt64(data.asLongBuffer(), shape);
    }

    public long numel() {
        return numel(shape);
    }

    public static long numel(long[] shape) {
        long count = 1;
        for (long dimension : shape) count *= dimension;
        return count;
    }

    public long[] shape() {
        return shape.clone();
    }

    public abstract DType dtype();

    public float[] getDataAsFloatArray() {
        throw new IllegalStateException("Tensor of type " + getClass().getSimpleName()
                + " cannot return data as float array.");
    }

    public long[] getDataAsLongArray() {
        throw new IllegalStateException("Tensor of type " + getClass().getSimpleName()
                + " cannot return data as long array.");
    }

    abstract Buffer getRawDataBuffer();

    private static final class TensorFloat32 extends Tensor {
        private final FloatBuffer data;

        TensorFloat32(FloatBuffer data, long[] shape) {
            super(shape);
            this.data = data;
        }

        @Override
        public DType dtype() {
            return DType.FLOAT;
        }

        @Override
        Buffer getRawDataBuffer() {
            return data;
        }

        @Override
        public float[] getDataAsFloatArray() {
            float[] values = new float[data.capacity()];
            data.rewind();
            data.get(values);
            return values;
        }
    }

    private static final class TensorFloat16 extends Tensor {
        private final ShortBuffer data;

        TensorFloat16(ShortBuffer data, long[] shape) {
            super(shape);
            this.data = data;
        }

        @Override
        public DType dtype() {
            return DType.HALF;
        }

        @Override
        Buffer getRawDataBuffer() {
            return data;
        }
    }

    private static final class TensorInt64 extends Tensor {
        private final LongBuffer data;

        TensorInt64(LongBuffer data, long[] shape) {
            super(shape);
            this.data = data;
        }

        @Override
        public DType dtype() {
            return DType.INT64;
        }

        @Override
        Buffer getRawDataBuffer() {
            return data;
        }

        @Override
        public long[] getDataAsLongArray() {
            long[] values = new long[data.capacity()];
            data.rewind();
            data.get(values);
            return values;
        }
    }
}
