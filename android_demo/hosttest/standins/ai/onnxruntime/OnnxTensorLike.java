package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {
    protected final long nativeHandle;
    protected final TensorInfo info;
    protected boolean closed = false;

    OnnxTensorLike(long nativeHandle, TensorInfo info) {
        this.nativeHandle = nativeHandle;
        this.info = info;
    }

    /** The real class returns the pointer of a closed tensor as well, and the process crashes. */
    long getNativeHandle() {
        checkClosed();
        return nativeHandle;
    }

    @Override
    public TensorInfo getInfo() {
        return info;
    }

    @Override
    public synchronized boolean isClosed() {
        return closed;
    }

    protected void checkClosed() {
        if (closed) throw new IllegalStateException("Trying to use a closed OnnxValue");
    }
}
