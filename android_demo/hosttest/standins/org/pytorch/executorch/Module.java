package org.pytorch.executorch;

import java.io.Closeable;
import java.io.File;
import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.util.Arrays;

public class Module implements Closeable {
    static {
        System.loadLibrary("et_standin");
    }

    public static final int LOAD_MODE_MMAP = 1;

    private long nativeHandle;

    private Module(long nativeHandle) {
        this.nativeHandle = nativeHandle;
    }

    /** Sets the size of the process's thread pool in every call, as the real class; 0 is half of the processors. */
    public static Module load(String modelPath, int loadMode, int numThreads) {
        if (loadMode != LOAD_MODE_MMAP) throw new IllegalArgumentException("stand-in: LOAD_MODE_MMAP only");
        File file = new File(modelPath);
        if (!file.canRead() || !file.isFile()) {
            throw new IllegalArgumentException("Cannot load model path: path does not exist: " + modelPath);
        }
        return new Module(loadNative(modelPath, numThreads));
    }

    public void loadMethod(String methodName) {
        checkOpen();
        loadMethodNative(nativeHandle, methodName);
    }

    /** The method gets inputs by address; outputs are its own memory until its next call. */
    public EValue[] execute(String methodName, EValue... inputs) {
        checkOpen();
        Buffer[] data = new Buffer[inputs.length];
        long[][] shapes = new long[inputs.length][];
        int[] types = new int[inputs.length];
        for (int i = 0; i < inputs.length; i++) {
            Tensor tensor = inputs[i].toTensor();
            data[i] = tensor.getRawDataBuffer();
            shapes[i] = tensor.shape;
            types[i] = tensor.dtype().jniCode;
        }
        Object[] outputs = executeNative(nativeHandle, methodName, data, shapes, types);
        EValue[] values = new EValue[outputs.length / 2];
        for (int i = 0; i < values.length; i++) {
            long[] info = (long[]) outputs[2 * i + 1];
            long[] shape = Arrays.copyOfRange(info, 1, info.length);
            values[i] = EValue.from(Tensor.nativeNewTensor((ByteBuffer) outputs[2 * i], shape, (int) info[0]));
        }
        return values;
    }

    public void destroy() {
        if (nativeHandle != 0) destroyNative(nativeHandle);
        nativeHandle = 0;
    }

    @Override
    public void close() {
        destroy();
    }

    private void checkOpen() {
        if (nativeHandle == 0) throw new IllegalStateException("Module has been destroyed");
    }

    private static native long loadNative(String path, int threads);

    private static native void loadMethodNative(long module, String method);

    /** Returns for each output its memory, then its type and shape. */
    private static native Object[] executeNative(
            long module, String method, Buffer[] data, long[][] shapes, int[] types);

    private static native void destroyNative(long module);
}
