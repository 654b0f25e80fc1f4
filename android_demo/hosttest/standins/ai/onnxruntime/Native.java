package ai.onnxruntime;

import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.util.concurrent.atomic.AtomicInteger;

/** The functions of ort.cpp, on the library of the onnxruntime wheel. The real package has no such class. */
public final class Native {
    static {
        System.loadLibrary("ort_standin");
    }

    private static final AtomicInteger open = new AtomicInteger();

    private Native() {}

    /** Number of tensors, sessions and options that are open, for a test to find leaks. */
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

    /** A tensor's type, then its shape. */
    static native long[] tensorInfo(long tensor) throws OrtException;

    static native ByteBuffer tensorBytes(long tensor);

    static native void closeTensor(long tensor);

    /** Run a session; outputs that are 0 are replaced by new tensors. */
    static native void run(long session, String[] inputNames, long[] inputs, String[] outputNames, long[] outputs)
            throws OrtException;
}
