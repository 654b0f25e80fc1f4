package org.pytorch.executorch;

public class ExecutorchRuntimeException extends RuntimeException {
    private final int errorCode;

    /** Called from native code; the real message names the code and appends the log on further lines. */
    public ExecutorchRuntimeException(int errorCode, String details) {
        super("[Executorch Error 0x" + Integer.toHexString(errorCode) + "] " + details);
        this.errorCode = errorCode;
    }

    public int getErrorCode() {
        return errorCode;
    }
}
