package org.pytorch.executorch;

public enum DType {
    INT64(4),
    HALF(5),
    FLOAT(6);

    final int jniCode;

    DType(int jniCode) {
        this.jniCode = jniCode;
    }
}
