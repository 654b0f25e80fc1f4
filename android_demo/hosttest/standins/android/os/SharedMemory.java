package android.os;

import android.system.ErrnoException;
import java.io.Closeable;
import java.nio.ByteBuffer;

/** Memory in direct buffers, which a test can let run out. */
public final class SharedMemory implements Closeable {
    public static int left = Integer.MAX_VALUE;
    public static int open;
    private final int size;

    private SharedMemory(int size) {
        this.size = size;
    }

    public static SharedMemory create(String name, int size) throws ErrnoException {
        if (size <= 0) throw new IllegalArgumentException("Size must be greater than zero");
        if (size > left) throw new ErrnoException("ashmem_create_region", 12);
        open++;
        return new SharedMemory(size);
    }

    public ByteBuffer mapReadWrite() throws ErrnoException {
        return ByteBuffer.allocateDirect(size);
    }

    @Override
    public void close() {
        open--;
    }
}
