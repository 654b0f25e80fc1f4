package androidx.work;

public enum BackoffPolicy { LINEAR }
