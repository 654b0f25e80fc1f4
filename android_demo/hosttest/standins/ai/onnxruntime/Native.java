package ai.onnxruntime;

import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.util.concurrent.atomic.AtomicInteger;

/** Not in the real package: what ort.cpp does, on the library of the onnxruntime wheel. */
public final class Native {
    static {
        System.loadLibrary("ort_standin");
    }

    private static final AtomicInteger open = new AtomicInteger();

    private Native() {}

    /** Tensors, sessions and options that were opened and not closed, so that a test sees leaks. */
    public static int open() {
        return open.get();
    }

    static void count(int change) {
        open.addAndGet(change);
    }

    static native String version();

    static native long createEnvironment(int logLevel, String name) throws OrtException;

    static native long createOptions();

    static native void setIntraOpNumThreads(long options, int threads) throws OrtException;

    static native void setSessionLogLevel(long options, int level) throws OrtException;

    static native void addConfigEntry(long options, String key, String value) throws OrtException;

    static native void closeOptions(long options);

    static native long createSession(long environment, String path, long options) throws OrtException;

    static native String[] names(long session, boolean outputs) throws OrtException;

    static native void closeSession(long session);

    static native long createTensor(Buffer data, long offset, long bytes, long[] shape, int type) throws OrtException;

    /** Type, then shape. */
    static native long[] tensorInfo(long tensor) throws OrtException;

    static native ByteBuffer tensorBytes(long tensor);

    static native void closeTensor(long tensor);

    /** Fills in the outputs that are 0. */
    static native void run(long session, String[] inputNames, long[] inputs, String[] outputNames, long[] outputs)
            throws OrtException;
}
