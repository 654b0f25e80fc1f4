package ai.onnxruntime;

import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.ShortBuffer;
import java.util.Arrays;

public class OnnxTensor extends OnnxTensorLike {
    private static final int FLOAT = 1; // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
    private static final int INT64 = 7;
    private static final int FLOAT16 = 10;

    private final int type;
    private final Buffer buffer; // keeps the memory alive

    OnnxTensor(long nativeHandle, int type, TensorInfo info, Buffer buffer) {
        super(nativeHandle, info);
        this.type = type;
        this.buffer = buffer;
        Native.count(1);
    }

    public static OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException {
        return createTensor(FLOAT, Float.BYTES, data, data.order(), shape);
    }

    public static OnnxTensor createTensor(OrtEnvironment env, LongBuffer data, long[] shape) throws OrtException {
        return createTensor(INT64, Long.BYTES, data, data.order(), shape);
    }

    public static OnnxTensor createTensor(OrtEnvironment env, ShortBuffer data, long[] shape, OnnxJavaType type)
            throws OrtException {
        if (type != OnnxJavaType.FLOAT16) throw new IllegalStateException("stand-in: shorts of type " + type);
        return createTensor(FLOAT16, Short.BYTES, data, data.order(), shape);
    }

    private static OnnxTensor createTensor(int type, int size, Buffer data, ByteOrder order, long[] shape)
            throws OrtException {
        // The real class copies the first and misreads the second, so both are errors here.
        if (!data.isDirect()) throw new IllegalStateException("stand-in: not a direct buffer, it would be copied");
        if (order != ByteOrder.nativeOrder()) throw new IllegalStateException("stand-in: not in native byte order");
        long count = 1;
        for (long dimension : shape) count *= dimension;
        if (count != data.remaining()) {
            throw new OrtException("Shape " + Arrays.toString(shape) + ", requires " + count
                    + " elements but the buffer has " + data.remaining() + " elements.");
        }
        long handle = Native.createTensor(data, (long) data.position() * size, count * size, shape, type);
        return new OnnxTensor(handle, type, new TensorInfo(shape.clone()), data);
    }

    /** A copy on the heap, or null if these are not floats. */
    public FloatBuffer getFloatBuffer() {
        checkClosed();
        if (type != FLOAT) return null;
        FloatBuffer values = bytes().asFloatBuffer();
        FloatBuffer copy = FloatBuffer.allocate(values.capacity()).put(values);
        copy.rewind();
        return copy;
    }

    /** A copy on the heap, or null if these are not longs. */
    public LongBuffer getLongBuffer() {
        checkClosed();
        if (type != INT64) return null;
        LongBuffer values = bytes().asLongBuffer();
        LongBuffer copy = LongBuffer.allocate(values.capacity()).put(values);
        copy.rewind();
        return copy;
    }

    private ByteBuffer bytes() {
        return Native.tensorBytes(nativeHandle).order(ByteOrder.nativeOrder());
    }

    @Override
    public synchronized void close() {
        if (closed) throw new IllegalStateException("stand-in: closed twice; the real class logs a warning");
        Native.closeTensor(nativeHandle);
        closed = true;
        Native.count(-1);
    }
}
